"""Low rank: linear layers and convolutions as two smaller ones, from their scores to what replaces them."""
