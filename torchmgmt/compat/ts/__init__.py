"""What ``import ts`` finds inside a worker."""
