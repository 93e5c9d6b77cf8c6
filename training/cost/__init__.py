"""Parameters and floating-point operations of models and training steps."""
