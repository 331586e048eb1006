"""What a model needs and what a chip gives, by arithmetic: no accelerator is touched."""
