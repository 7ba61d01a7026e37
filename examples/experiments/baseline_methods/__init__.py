"""Other ways to prune, from their papers: what the literature offers for a trained network that is not trained again.

Each changes a network in place, so that it has fewer channels inside of its blocks. `channels` is what they share.
"""
