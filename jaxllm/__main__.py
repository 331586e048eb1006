"""`python -m jaxllm`: the `jaxllm` command where its script is not installed."""

from jaxllm.cli import main

if __name__ == "__main__":
    main()
