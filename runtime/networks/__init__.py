"""The networks: one architecture a file, over the kernel interface; files.py builds them as a checkpoint holds them."""
