"""The train loops: SFT, reward model, PPO, and the three in order."""
