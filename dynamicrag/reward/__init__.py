"""Rewards of trajectories, and the preference pairs derived from them."""
