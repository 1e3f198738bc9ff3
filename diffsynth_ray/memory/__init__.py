"""Low VRAM: where weights and activations live, and when they move. Works on plain modules, whatever the model."""
