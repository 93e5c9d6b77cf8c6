"""What makes the models faster on a particular machine; nothing here changes what is computed."""
