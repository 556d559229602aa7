"""Datasets of other forms: LeRobot in and out, DROID in, stereo sets with true disparity; a copy with estimated depth."""
