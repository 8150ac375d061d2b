"""Task prefixes (sec. 3.2): what stands before a text says what its embedding is for.

A question and its answer are written differently: "search_query: " and "search_document: " let them
be close. "clustering: " and "classification: " ask for texts of the same kind. Without prefixes one
embedding would have to serve both, and two questions about one thing would be as close to each
other as to its answer.
"""

# task -> prefix
PREFIXES = {"query": "search_query: ", "document": "search_document: "}
PREFIXES |= {"classification": "classification: ", "clustering": "clustering: "}
# A checkpoint has them under mteb's names of task types too (sec. 5.2.1; for reranking as in the
# released code), so that mteb finds the prefix of every task by itself
PROMPTS = PREFIXES | {"Clustering": "clustering: ", "QuoraRetrieval-document": "search_query: "}
TYPES = "Classification MultilabelClassification PairClassification Reranking STS Summarization"
PROMPTS |= dict.fromkeys([*TYPES.split(), "BitextMining"], "classification: ")
