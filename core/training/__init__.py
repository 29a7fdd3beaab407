"""What the SFT and RL learners share."""
