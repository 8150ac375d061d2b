# %% [markdown]
# # The lab as a notebook
#
# VS Code opens this file as a notebook as it is, Jupyter with jupytext. It calls the same commands
# as the terminal; exercises are written in `lab/work/`, in an editor beside it. What to do is in
# `lab/README.md`.

# %%
import sys
from pathlib import Path

ROOT = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "lab" / "lab.py").is_file())
sys.path.insert(0, str(ROOT))
from lab import lab  # noqa: E402

WORK = ROOT / "lab" / "work"


def command(*words):
    """A command of lab/lab.py: command("check", "rotate")."""
    try:
        lab.main([*words, f"--work={WORK}", f"--out={ROOT}/out", f"--data={ROOT}/out/pydocs"])
    except (SystemExit, lab.InputError) as problem:
        print(problem if isinstance(problem, lab.InputError) else "", end="")


def picture(name):
    command("show", name)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=WORK / f"{name}.png"))


command("start")

# %% [markdown]
# ## Hide words and guess them: `lab/work/mask_tokens.py`

# %%
command("hint", "mask_tokens")
command("check", "mask_tokens")
picture("mask_tokens")

# %% [markdown]
# ## Positions are rotations: `lab/work/rotate.py`

# %%
command("hint", "rotate")
command("check", "rotate")
picture("rotate")

# %% [markdown]
# ## One vector from many: `lab/work/mean_pool.py`

# %%
command("hint", "mean_pool")
command("check", "mean_pool")
picture("mean_pool")

# %% [markdown]
# ## Which document is mine? `lab/work/info_nce.py`

# %%
command("hint", "info_nce")
command("check", "info_nce")
picture("info_nce")

# %% [markdown]
# ## Is it any good? `lab/work/ndcg.py`

# %%
command("hint", "ndcg")
command("check", "ndcg")
picture("ndcg")

# %% [markdown]
# ## Predict, then measure
#
# Change the prediction before you run it. `few-pairs`, `stage-2`, `gather` and `hard-negatives`
# train for some minutes.

# %%
command("experiment", "rope", "--predict=0.1")

# %%
command("status")
