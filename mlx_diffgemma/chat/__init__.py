"""Conversations: markup told apart, replies, and the turns of a user and a model."""
