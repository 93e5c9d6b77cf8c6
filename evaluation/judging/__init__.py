"""Judge models: questions, answers, the stage `scores`, and calibration against known pairs."""
