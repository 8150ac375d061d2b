"""The exercises: functions of the real files, in the order of the lecture. The first five are for
class, the others for home.

The real function is the solution. `wrong` has answers that students give, each as an edit of the
real one: tests/test_lab.py asserts that every one of them fails."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    file: str  # of the project, where the function is; FILE.py has its tests in tests/test_FILE.py
    function: str  # its name; "Class.method" for a method
    tests: tuple  # that judge it
    idea: str  # the first hint
    shapes: str  # the second one
    hidden: str  # what the line contains that the third hint leaves out
    wrong: tuple  # (old, new): edits of the real function, each a plausible wrong answer

    @property
    def name(self):
        return self.function.lower().replace(".", "_")


EXERCISES = (
    Exercise(
        "mlm.py",
        "mask_tokens",
        (
            "test_30_percent_of_tokens_are_chosen_and_of_these_80_10_10",
            "test_special_tokens_are_never_chosen_and_only_chosen_tokens_change",
        ),
        "Draw one random number per token to decide whether it is chosen, and a second one to "
        "decide what happens to it: below 0.8, between 0.8 and 0.9, or above.",
        "rng.random(len(tokens)) is (L,). chosen is a boolean array (L,). np.where(condition, a, b)"
        " chooses element by element. Random tokens: rng.integers(vocab_size, size=how_many).",
        "at_random =",
        (
            (
                "chosen = (rng.random(len(tokens)) < probability) & ~np.isin(tokens, special_ids)"
                "\n    kind = rng.random(len(tokens))",
                "kind = rng.random(len(tokens))"
                "\n    chosen = (kind < probability) & ~np.isin(tokens, special_ids)",
            ),
            (" & ~np.isin(tokens, special_ids)", ""),
            ("at_random = chosen & ", "at_random = "),
        ),
    ),
    Exercise(
        "rope.py",
        "rotate",
        (
            "test_a_pair_is_turned_by_its_angle",
            "test_a_pair_is_a_feature_of_each_half",
            "test_the_score_of_query_and_key_depends_only_on_their_distance",
        ),
        "Split x into its first and its second half. (x1_i, x2_i) is a point in a plane; turn it by"
        " theta: (x1 cos - x2 sin, x2 cos + x1 sin). Then put the halves together again.",
        "x is (N, ..., D), often (N, 3, H, D). cos and sin are (N, D/2): give them dimensions of "
        "size 1, (N, 1, 1, D/2), so that they broadcast. x.chunk(2, dim=-1) makes the halves.",
        "return torch.cat",
        (
            (
                "x1 * cos - x2 * sin, x2 * cos + x1 * sin",
                "x1 * cos + x2 * sin, x2 * cos - x1 * sin",
            ),
            ("x2 * cos + x1 * sin", "x2 * cos - x1 * sin"),
            (
                "x1, x2 = x.chunk(2, dim=-1)\n    return torch.cat((x1 * cos - x2 * sin, "
                "x2 * cos + x1 * sin), dim=-1)",
                "x1, x2 = x[..., ::2], x[..., 1::2]\n    return torch.stack((x1 * cos - x2 * sin, "
                "x2 * cos + x1 * sin), dim=-1).flatten(-2)",
            ),
        ),
    ),
    Exercise(
        "model.py",
        "mean_pool",
        (
            "test_an_embedding_is_the_mean_of_the_hidden_states_at_unit_length",
            "test_an_embedding_does_not_depend_on_its_batch",
        ),
        "Texts stand one behind the other. Say for each token which text it is of, add up the "
        "hidden states of each text, and divide by its length.",
        "cu_seqlens.diff() are the lengths (B,). torch.repeat_interleave(lengths) gives the text "
        "of each token (N,). zeros(B, C).index_add(0, text, hidden) adds rows up. Under "
        "torch.no_grad() add in float64: 8,192 float32 numbers lose digits.",
        "return (sums",
        (
            (" / lengths[:, None]", ""),
            (" / lengths[:, None]", " / len(hidden)"),
            ("dtype if torch.is_grad_enabled() else torch.float64", "dtype"),
        ),
    ),
    Exercise(
        "contrastive.py",
        "info_nce",
        (
            "test_info_nce_equals_a_loop",
            "test_info_nce_of_equal_embeddings_is_ln_n_and_of_perfect_ones_almost_0",
            "test_copies_of_the_right_document_are_no_negatives",
        ),
        "It is a classification: the classes are the documents, the logits are the cosines over "
        "the temperature, and the label of query i is the number of its own document.",
        "query @ document.T is (b, M). The labels are first, first + 1, ... (b,). F.cross_entropy("
        'logits, labels, reduction="sum"). With keys, call without_copies on the logits first.',
        "logits = query",
        (
            ('reduction="sum"', 'reduction="mean"'),
            ("torch.arange(first, first + len(query)", "torch.arange(len(query)"),
            ("logits if keys is None else without_copies(logits, right, keys)", "logits"),
        ),
    ),
    Exercise(
        "evaluate.py",
        "ndcg",
        (
            "test_one_relevant_document_at_each_rank",
            "test_several_relevant_documents_of_different_grades",
        ),
        "A document at rank r adds its grade / log2(1 + r), r from 1. Divide by the largest sum "
        "possible: all relevant documents, the highest grades first.",
        "ranking is a sequence of numbers of documents; relevant.get(document, 0) is a grade. Look "
        "at the first k of both sums. enumerate counts from 0, ranks from 1.",
        "best = sorted",
        (
            ("2 + i", "3 + i"),
            ("sorted(relevant.values(), reverse=True)[:k]", "sorted(gain, reverse=True) or [1]"),
            ("in ranking[:k]]", "in ranking]"),
        ),
    ),
    Exercise(
        "rope.py",
        "dynamic_ntk_base",
        (
            "test_dynamic_ntk_equals_plain_rope_up_to_the_trained_length",
            "test_dynamic_ntk_has_the_published_base_beyond_the_trained_length",
            "test_dynamic_ntk_does_not_jump_at_the_trained_length",
        ),
        "ntk_base slows the slowest pair by a factor. Here the factor follows from the length: 1 "
        "at the trained length, s more for each trained length beyond.",
        "length is (B,), one for each text, and the factor is too. factor.clamp(min=1.0) leaves "
        "short texts alone.",
        "factor = s",
        (
            ("factor.clamp(min=1.0)", "factor"),
            (" - (s - 1)", ""),
            ("s * length / trained_length - (s - 1)", "length / trained_length"),
        ),
    ),
    Exercise(
        "finetune.py",
        "matryoshka_loss",
        ("test_matryoshka_adds_the_loss_of_the_first_dimensions_in_the_sizes_of_v1_5",),
        "The same loss several times: of embeddings that are cut to their first dimensions.",
        "query[:, :size] is (b, size), and no longer of unit length.",
        "q, d =",
        (
            ("F.normalize(document[:, :size], dim=-1)", "document[:, :size]"),
            ("loss = loss + info", "loss = info"),
        ),
    ),
    Exercise(
        "finetune.py",
        "mine_hard_negatives",
        (
            "test_negatives_are_the_nearest_that_score_below_the_margin_and_never_the_right_one",
            "test_mining_equals_its_plain_twin",
        ),
        "Of the documents that were found, drop those that are marked as answers and those that "
        "likely_answers takes for some. What is left is hard, and negative.",
        "found, known and the result are (b, k). Dropped ones become -1 and go to the end; the "
        "others keep their order: argsort with kind='stable', then np.take_along_axis.",
        "kept_first =",
        (
            ("known | likely_answers", "likely_answers"),
            ("document, right, found, margin)", "document, right, found, np.inf)"),
            ("return np.take_along_axis(negatives, kept_first, axis=1)", "return negatives"),
        ),
    ),
    Exercise(
        "contrastive.py",
        "Gather.backward",
        ("test_only_gathering_with_gradient_has_the_gradient_of_one_process",),
        "Each process has a gradient for the rows of all processes, and each is only a part: add "
        "them up. Then each process keeps that of its own rows.",
        "gradient is (world * b, E), the result (b, E). dist.all_reduce adds up in place and needs "
        "contiguous memory. dist.get_world_size(), dist.get_rank().",
        "return gradient.chunk",
        (
            ("dist.all_reduce(gradient)", "pass"),
            ("[dist.get_rank()]", "[dist.get_rank()] / dist.get_world_size()"),
        ),
    ),
    Exercise(
        "contrastive.py",
        "grad_cache",
        ("test_grad_cache_has_the_gradient_of_the_whole_batch",),
        "The docstring has the three steps. The second forward pass of a micro-batch is backward "
        "from the gradients that the loss gave its embeddings.",
        "embed(model, texts, micro_batch_tokens) is (B, E). After loss.backward(), embeddings.grad "
        "is too. store.split_by_tokens gives groups: arrays of numbers of texts. "
        "tensor.backward(gradient) goes on from a gradient.",
        "again.backward",
        (
            (
                "embeddings.grad.index_select(0, move_to_device(group, model.device))",
                "embeddings.grad[: len(group)]",
            ),
            ("embeddings.grad.index_select", "embeddings.index_select"),
        ),
    ),
)
