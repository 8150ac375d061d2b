"""Right answers to the exercises of the lab, written otherwise than the real functions: loops,
einsum, another order of operations. tests/test_lab.py asserts that the judge passes them."""
# ruff: noqa: F821 (the names are those of the file in which a function is put)


def mask_tokens(tokens, probability, rng, mask_id, special_ids, vocab_size):
    inputs, chosen = tokens.copy(), np.zeros(len(tokens), bool)
    for i, token in enumerate(tokens):
        if token in special_ids or rng.random() >= probability:
            continue
        chosen[i], kind = True, rng.random()
        if kind >= 0.2:
            inputs[i] = mask_id
        elif kind >= 0.1:
            inputs[i] = rng.integers(vocab_size)
    return inputs, chosen


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    a = torch.einsum("n...d,nd->n...d", x[..., :half], cos)
    b = torch.einsum("n...d,nd->n...d", x[..., half:], sin)
    c = torch.einsum("n...d,nd->n...d", x[..., :half], sin)
    d = torch.einsum("n...d,nd->n...d", x[..., half:], cos)
    return torch.cat((a - b, c + d), dim=-1)


def mean_pool(hidden, cu_seqlens):
    """Of slices, in float64 always."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bounds = cu_seqlens.tolist()
    texts = [hidden[a:b].double().mean(0) for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(texts).to(dtype)


def info_nce(query, document, temperature, first=0, keys=None):
    loss = 0.0
    for i in range(len(query)):
        scores = torch.einsum("e,me->m", query[i], document) / temperature
        counted = torch.ones(len(document), dtype=torch.bool)
        if keys is not None:
            counted = keys != keys[first + i]
            counted[first + i] = True
        loss = loss + scores[counted].logsumexp(0) - scores[first + i]
    return loss


def ndcg(ranking, relevant, k=10):
    found = best = 0.0
    for rank, document in enumerate(ranking, start=1):
        if rank <= k and document in relevant:
            found += relevant[document] / math.log2(rank + 1)
    for rank, grade in enumerate(sorted(relevant.values())[: -k - 1 : -1], start=1):
        best += grade / math.log2(rank + 1)
    return found / best


def dynamic_ntk_base(base, length, trained_length, s, head_size):
    factor = s * (length / trained_length - 1) + 1
    longer = base * factor ** (head_size / (head_size - 2))
    return torch.where(length > trained_length, longer, base)


def matryoshka_loss(query, document, temperature, first, sizes, keys=None):
    def short(x, size):
        return x[:, :size] / x[:, :size].norm(dim=1, keepdim=True)

    return sum(
        info_nce_in_blocks(short(query, size), short(document, size), temperature, first, keys)
        for size in sizes[::-1]
    )


def mine_hard_negatives(query, document, right, answers, count, margin=1.0):
    negatives = torch.full((len(query), count), -1)
    for i in range(len(query)):
        scores = torch.einsum("e,me->m", query[i], document)
        bound = scores[right[i]] - (1 - margin) * abs(scores[right[i]])
        sorted_by_score = scores.argsort(descending=True).tolist()
        kept = [j for j in sorted_by_score if scores[j] < bound and j not in answers[i]][:count]
        negatives[i, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return negatives


def backward(ctx, gradient):
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, gradient.contiguous())
    total, b = torch.stack(parts).sum(0), len(gradient) // dist.get_world_size()
    return total[b * dist.get_rank() : b * (dist.get_rank() + 1)]


def grad_cache(model, texts, loss_of, micro_batch_tokens):
    """The second pass by a product whose gradient is that of the loss."""
    with torch.no_grad():
        cached = embed(model, texts, micro_batch_tokens)
    cached.requires_grad_()
    loss = loss_of(cached)
    (gradient,) = torch.autograd.grad(loss, cached)
    for group in reversed(store.split_by_tokens(list(map(len, texts)), micro_batch_tokens)):
        again = embed(model, [texts[i] for i in group], micro_batch_tokens)
        (again * gradient[group]).sum().backward()
    return loss.detach()
