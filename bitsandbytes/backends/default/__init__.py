"""Every operator in plain PyTorch: the reference for all other backends, and what runs where there is no native kernel."""
