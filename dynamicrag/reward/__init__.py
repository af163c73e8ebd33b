"""Reward: what a trajectory is worth, and the preference pairs that follow."""
