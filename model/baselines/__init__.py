"""The paper's baselines and today's off-the-shelf models, each answering through `pixellm.model.segmenter`."""
