"""Where the method meets other libraries: Hugging Face folders, the Trainer and Accelerate, NVIDIA apex."""
