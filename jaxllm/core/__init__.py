"""Host logic: requests, pages and the scheduler. Imports no JAX, so that tests can simulate it by the million steps."""
