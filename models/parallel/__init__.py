"""One model on several ranks: what each of them holds, and how rank 0 has the others do what it does."""
