"""What each part of the objective is worth on the embedded benchmark, beside controls, over seeds."""
