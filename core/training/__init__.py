"""The parts that the SFT and RL learners share."""
