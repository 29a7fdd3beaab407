"""Supervised fine-tuning: the curriculum of basic SFT, LongCoT SFT, think-fusion SFT, and the model soup."""
