"""Other forms of datasets: LeRobot in and out, DROID in, stereo sets with true disparity, and estimated depth."""
