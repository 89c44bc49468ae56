"""In the wild: recognisers on real recordings with human-made subtitles; where do the pruned ones break first?"""
