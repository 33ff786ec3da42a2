"""What users call: compiled models, one module for each family of autoencoders."""
