"""Publishing on the Hugging Face Hub: models, model cards and Spaces."""
