"""BERT4Rec sequential recommendation as a batch system on Ray."""
