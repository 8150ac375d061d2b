"""The exercises: functions of the real files, in the order of the lecture. The first five are for
class, the others for home.

The real function is the solution. `wrong` has answers that students give, each as an edit of the
real one: tests/test_lab.py asserts that every one of them fails."""

import ast
import re
import textwrap
from dataclasses import dataclass

from lab.cutting import ROOT, real


@dataclass(frozen=True, eq=False)
class Exercise:
    path: str  # FILE.function or FILE.Class.method; its tests are in tests/test_FILE.py
    tests: dict  # that judge it: name -> how many cases it has
    idea: str  # the first hint
    shapes: str  # the second one
    hidden: str  # what the line contains that the third hint leaves out
    wrong: tuple  # (old, new): edits of the real function, each a plausible wrong answer
    helpers: str = ""  # functions of the project that it may call: "name in FILE; name in FILE"

    @property
    def file(self):
        return self.path.split(".")[0] + ".py"

    @property
    def function(self):
        return self.path.split(".", 1)[1]

    @property
    def name(self):
        return self.function.lower().replace(".", "_")


def stub(exercise):
    """What a student begins with: what may be called, the signature, the docstring, no more."""
    node = ast.parse(real(exercise)).body[0]
    kept = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    head = "".join(real(exercise).splitlines(keepends=True)[:kept])
    about = f"# From {exercise.file}, whose names and imports you can use. Helpers go inside.\n"
    about += "".join(map(describe, re.findall(r"(\S+) in ([^;]+)", exercise.helpers)))
    about += f"# python lab/lab.py check {exercise.name}\n\n"
    return f"{about}{head}    raise NotImplementedError\n"


def describe(helper):
    """The signature and the docstring of a function (name, FILE), as a comment."""
    name, file = helper
    nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    node = next(n for n in nodes if getattr(n, "name", None) == name.split(".")[-1])
    arguments = ast.unparse(node.args).removeprefix("self, ")
    about = ast.get_docstring(node).replace("\n\n", "\n")
    return f"# {name}({arguments})\n" + textwrap.indent(about, "#     ") + "\n"


EXERCISES = (
    Exercise(
        "mlm.mask_tokens",
        {
            "test_30_percent_of_tokens_are_chosen_and_of_these_80_10_10": 1,
            "test_special_tokens_are_never_chosen_and_only_chosen_tokens_change": 1,
            "test_the_mask_of_a_text_depends_on_its_seed_and_not_on_its_batch": 1,
        },
        "Draw one random number per token to decide whether it is chosen, and a second one to "
        "decide what happens to it: below 0.8, between 0.8 and 0.9, or above.",
        "rng.random(len(tokens)) is (L,). chosen is a boolean array (L,). np.where(condition, a, b)"
        " chooses element by element. Random tokens: rng.integers(vocab_size, size=how_many).",
        "at_random =",
        (
            ("kind = ", "kind = probability * "),  # as if one number decided both
            (" & ~np.isin(tokens, special_ids)", ""),
            ("at_random = chosen & ", "at_random = "),
            ("kind = rng.random(len(tokens))", "kind = np.random.random(len(tokens))"),
            ("rng.integers(vocab_size, size=at_random.sum())", "tokens[at_random] - 1"),
            ("return inputs", "tokens[:] = inputs\n    return inputs"),  # the caller's array
        ),
    ),
    Exercise(
        "rope.rotate",
        {
            "test_a_pair_is_turned_by_its_angle": 1,
            "test_a_pair_is_a_feature_of_each_half": 1,
            "test_all_that_lies_between_n_and_d_turns_alike": 3,
            "test_the_score_of_query_and_key_depends_only_on_their_distance": 1,
        },
        "Split x into its first and its second half. (x1_i, x2_i) is a point in a plane; turn it by"
        " theta: (x1 cos - x2 sin, x2 cos + x1 sin). Then put the halves together again.",
        "x is (N, ..., D), of two dimensions or more. cos and sin are (N, D/2): give them as many "
        "dimensions of size 1 as x has between N and D, (N, 1, 1, D/2) for (N, 2, H, D), so that "
        "they broadcast. x.chunk(2, dim=-1) makes the halves.",
        "return torch.cat",
        (
            ("x1 * cos - x2 * sin, x2 * cos + x1", "x1 * cos + x2 * sin, x2 * cos - x1"),
            ("x2 * cos + x1 * sin", "x2 * cos - x1 * sin"),
            ("    cos, sin = cos.view(shape), sin.view(shape)\n", ""),
            ("x.chunk(2, dim=-1)", "x[..., ::2], x[..., 1::2]"),
        ),
    ),
    Exercise(
        "model.mean_pool",
        {
            "test_an_embedding_is_the_mean_of_the_hidden_states_at_unit_length": 1,
            "test_an_embedding_does_not_depend_on_its_batch": 1,
            "test_the_mean_of_a_long_text_is_precise": 3,
        },
        "Texts stand one behind the other. Say for each token which text it is of, add up the "
        "hidden states of each text, and divide by its length.",
        "cu_seqlens.diff() are the lengths (B,). torch.repeat_interleave(lengths) gives the text "
        "of each token (N,). torch.zeros(B, C).index_add(0, text, hidden) adds rows up; both have "
        "to be float64. torch.promote_types(dtype, torch.float32) is the type of the result.",
        "means = sums",
        (
            (" / lengths[:, None]", ""),
            (" / lengths[:, None]", " / len(hidden)"),
            ("torch.float64, device", "torch.float32, device"),
            ("hidden.double()", "hidden.double() * (text > 0)[:, None]"),
            ("torch.promote_types(hidden.dtype, torch.float32)", "hidden.dtype"),
            ("torch.promote_types(hidden.dtype, torch.float32)", "torch.float32"),
        ),
        helpers="move_to_device in common/device.py",
    ),
    Exercise(
        "contrastive.info_nce",
        {
            "test_info_nce_equals_a_loop": 1,
            "test_info_nce_of_equal_embeddings_is_ln_n_and_of_perfect_ones_almost_0": 1,
            "test_copies_of_the_right_document_are_no_negatives": 1,
        },
        "It is a classification: the classes are the documents, the logits are the cosines over "
        "the temperature, and the label of query i is the number of its own document.",
        "query @ document.T is (b, M). The labels are first, first + 1, ... (b,). F.cross_entropy("
        'logits, labels, reduction="sum"). With keys, call without_copies on the logits first.',
        "logits = query",
        (
            ('reduction="sum"', 'reduction="mean"'),
            ("torch.arange(first, first + len(query)", "torch.arange(len(query)"),
            ("logits if keys is None else without_copies(logits, right, keys)", "logits"),
            (
                "without_copies(logits, right, keys)",
                "logits.masked_fill((keys[: len(query), None] == keys)\n"
                "        & (torch.arange(len(keys)) != right[:, None]), -torch.inf)",
            ),
            (" / temperature", " * temperature"),
        ),
        helpers="without_copies in contrastive.py",
    ),
    Exercise(
        "metrics.ndcg",
        {
            "test_one_relevant_document_at_each_rank": 1,
            "test_several_relevant_documents_of_different_grades": 1,
            "test_the_best_ranking_scores_1_at_every_k_and_what_comes_later_counts_nothing": 4,
        },
        "A document at rank r adds its grade / log2(1 + r), r from 1. Divide by the largest sum "
        "possible: all relevant documents, the highest grades first.",
        "ranking is a sequence of numbers of documents; relevant.get(document, 0) is a grade. Look "
        "at the first k of both sums. enumerate counts from 0, ranks from 1.",
        "best = sorted",
        (
            ("2 + i", "3 + i"),
            ("sorted(relevant.values(), reverse=True)[:k]", "sorted(gain, reverse=True) or [1]"),
            ("in ranking[:k]]", "in ranking]"),
            ("reverse=True)[:k]", "reverse=True)"),
            ("gain = ", "k = 10\n    gain = "),
            ("(grade / math", "((2**grade - 1) / math"),
        ),
    ),
    Exercise(
        "rope.dynamic_ntk_base",
        {
            "test_dynamic_ntk_equals_plain_rope_up_to_the_trained_length": 1,
            "test_dynamic_ntk_has_the_published_base_beyond_the_trained_length": 2,
            "test_dynamic_ntk_does_not_jump_at_the_trained_length": 3,
            "test_each_text_counts_from_zero_and_has_the_base_of_its_own_length": 1,
        },
        "ntk_base slows the slowest pair by a factor. Here the factor follows from the length: 1 "
        "at the trained length, s more for each trained length beyond.",
        "length is (B,), one for each text, and the factor is too. factor.clamp(min=1.0) leaves "
        "short texts alone.",
        "factor = s",
        (
            ("factor.clamp(min=1.0)", "factor"),
            (" - (s - 1)", ""),
            ("s * length / trained_length - (s - 1)", "length / trained_length"),
            ("s * length / trained", "s * length.max() / trained"),
        ),
        helpers="ntk_base in rope.py",
    ),
    Exercise(
        "finetune.matryoshka_loss",
        {"test_matryoshka_adds_the_loss_of_the_first_dimensions_in_the_sizes_of_v1_5": 1},
        "The same loss several times: of embeddings that are cut to their first dimensions.",
        "query[:, :size] is (b, size), and no longer of unit length.",
        "q, d =",
        (
            ("F.normalize(document[:, :size], dim=-1)", "document[:, :size]"),
            ("loss = loss + info", "loss = info"),
            (", keys)", ")"),
            (", first, keys)", ", 0, keys)"),
            ("F.normalize(query[:, :size], dim=-1)", "query[:, :size]"),
        ),
        helpers="info_nce_in_blocks in contrastive.py",
    ),
    Exercise(
        "finetune.mine_hard_negatives",
        {
            "test_negatives_are_the_nearest_that_score_below_the_margin_and_never_the_right_one": 4,
            "test_the_nearest_below_the_answer_are_mined_however_low_it_ranks": 1,
            "test_a_score_equal_to_that_of_the_right_document_is_dropped": 1,
            "test_mining_equals_its_plain_twin": 1,
        },
        "Of all documents drop those that are marked as answers and those that score too high to "
        "be wrong. Of the others take the nearest.",
        "query @ document.T is (b, m); scores.gather(1, right[:, None]) are those of the right "
        "documents (b, 1). Give dropped documents the score -inf. scores.topk(k) has values and "
        "indices, (b, k). F.pad(x, (0, n), value=-1) adds n columns.",
        "best = scores",
        (
            ("own - (1 - margin) * own.abs()", "margin * own"),
            ("row[[*numbers]] = False", "pass"),
            ("wrong = scores < own", "wrong = scores <= own"),
            ("best.indices.masked_fill(best.values == -torch.inf, -1)", "best.indices"),
            (  # the nearest first, and then dropped, as the released miner does it
                "masked_fill(~wrong, -torch.inf)",
                "masked_fill(~wrong | (scores < scores.topk(count)[0][:, -1:]), -torch.inf)",
            ),
        ),
    ),
    Exercise(
        "contrastive.Gather.backward",
        {"test_only_gathering_with_gradient_has_the_gradient_of_one_process": 1},
        "Each process has a gradient for the rows of all processes, and each is only a part: add "
        "them up. Then each process keeps that of its own rows.",
        "gradient is (world * b, E), the result (b, E). dist.all_reduce adds up in place and needs "
        "contiguous memory. dist.get_world_size(), dist.get_rank().",
        "return gradient.chunk",
        (
            ("dist.all_reduce(gradient)", "pass"),
            ("[dist.get_rank()]", "[dist.get_rank()] / dist.get_world_size()"),
            ("[dist.get_rank()]", "[0]"),
        ),
    ),
    Exercise(
        "contrastive.grad_cache",
        {
            "test_grad_cache_has_the_gradient_of_the_whole_batch": 4,
            "test_grad_cache_keeps_the_activations_of_one_micro_batch_at_a_time": 1,
        },
        "The docstring has the three steps. The second forward pass of a micro-batch is backward "
        "from the gradients that the loss gave its embeddings.",
        "embed(model, texts, micro_batch_tokens) is (B, E). After loss.backward(), embeddings.grad "
        "is too. store.split_by_tokens gives groups: arrays of numbers of texts. "
        "tensor.backward(gradient) goes on from a gradient.",
        "again.backward",
        (
            ("(0, move_to_device(group, model.device))", "(0, torch.arange(len(group)))"),
            ("embeddings.grad.index_select", "embeddings.index_select"),
            (
                "loss.backward()\n",
                "loss_of(embed(model, texts, micro_batch_tokens)).backward()\n    return loss\n",
            ),
        ),
        helpers="embed in contrastive.py; model.embed in model.py; "
        "store.split_by_tokens in data/store.py; store.pack in data/store.py",
    ),
)
