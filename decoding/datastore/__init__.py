"""The corpus of the retrieval drafter (REST, 2311.08252): token ids with their suffix array, in one file.

``corpus`` reads texts, ``build`` writes the file, ``layout`` is the file itself and what is looked up in it. None of
them imports torch.
"""
