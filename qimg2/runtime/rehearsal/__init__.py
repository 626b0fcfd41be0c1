"""Train steps compiled for TPU pods that need not exist, and what is read from them."""
