"""What a trained model does: who is used and for what, how sparsely, along which directions."""
