"""Statistics over scores, and analyses of fusion weights and time gates: stages `results` and the analyses."""
