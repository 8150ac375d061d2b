"""The tokenizer of a data folder: how it is trained, and how it turns texts into token ids."""

import functools
import re
from collections import Counter

import numpy as np
from tokenizers import Tokenizer, decoders, models, processors, trainers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from common.files import SPECIAL_TOKENS, write_whole

BERT = BertNormalizer, BertPreTokenizer
# a punctuation mark of ASCII, or what stands between such marks and blanks
PIECE = re.compile(r"[!-/:-@\[-`{-~]|[^!-/:-@\[-`{-~ \t\n\r]+")


def train_tokenizer(texts, vocab_size):
    """A WordPiece tokenizer like that of bert-base-uncased: lower case, no accents, [CLS] text
    [SEP]. Equal texts give an equal tokenizer.

    The library's trainer alone does not promise that: it numbers continuation pieces ("##a") in the
    order in which its threads find them, and breaks ties by number. So those of one character are
    passed as special tokens, which are numbered first. A second tokenizer gets the vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    counts = Counter()
    for text in texts:
        counts.update(text)
    # characters that are rare, or beyond a quarter of the vocabulary, become [UNK]
    least = min(50, max(2, counts.total() // 100_000))
    common = [c for c, count in counts.most_common(vocab_size // 4) if count >= least]
    frequent = "".join(dict.fromkeys([*common, *filter(str.isascii, counts)]))
    alphabet = sorted(set(tokenizer.normalizer.normalize_str(frequent)) - {" "})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{c}" for c in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))

    trained = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    trained.add_special_tokens(SPECIAL_TOKENS)
    trained.encode_special_tokens = True  # "[MASK]" in a text is text, as for load_tokenizer
    ends = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return trained


def save_tokenizer(folder, tokenizer):
    write_whole(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))


def id_type(tokenizer):
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


@functools.cache
def known_pieces(tokenizer):
    """piece -> its ids as bytes, remembered for each tokenizer."""
    return {}


def reads_pieces_apart(tokenizer):
    """Whether what a tokenizer makes of a piece does not depend on the pieces around it. By BERT's
    rules it does not."""
    rules = tokenizer.normalizer, tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder().values()  # one that is not special may have blanks
    return tuple(map(type, rules)) == BERT and all(token.special for token in added)


def encode(tokenizer, texts):
    """The token ids of each text, [CLS] ... [SEP]: a list of arrays, as they are on disk.

    Texts are made of the same words and marks again and again. Each different one goes through the
    tokenizer once, which takes less time than whole texts do (docs/speed.md)."""
    dtype, texts = id_type(tokenizer), list(texts)
    if not reads_pieces_apart(tokenizer):
        return [np.array(x.ids, dtype) for x in tokenizer.encode_batch_fast(texts)]
    known = known_pieces(tokenizer)
    if len(known) > 500_000:  # some 60 MB
        known.clear()
    split = [PIECE.findall(text) for text in texts]
    new = list({piece for pieces in split for piece in pieces} - known.keys())
    encodings = tokenizer.encode_batch_fast(new, add_special_tokens=False)
    known |= {p: np.array(x.ids, dtype).tobytes() for p, x in zip(new, encodings, strict=True)}
    first, last = (np.array([i], dtype).tobytes() for i in tokenizer.encode("").ids)
    ids = [b"".join((first, *map(known.__getitem__, pieces), last)) for pieces in split]
    for piece in new:
        if len(piece) > 50:  # of a script without blanks: it hardly comes again
            del known[piece]
    return [np.frombuffer(x, dtype) for x in ids]
