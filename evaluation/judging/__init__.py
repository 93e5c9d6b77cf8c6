"""Judge models: questions and answers, and the stages `scores` and `judge_calibration`."""
