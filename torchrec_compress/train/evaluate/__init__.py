"""What a trained model is worth: scores, metrics, how its codes are used."""
