"""Models as their authors run them, to be measured beside ours: same weights, published order of steps."""
