"""The protocol of `lightspine bench MODELS`: whole models, ours and timm's, measured in turns."""
