"""From a trained model to the Hugging Face Hub."""
