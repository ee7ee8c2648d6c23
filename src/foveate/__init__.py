"""High-resolution image transformers that spend their tokens where the image has something to say."""
