"""The main job: learn several tasks few-shot on one frozen encoder, then serve them all in one batch."""
