"""Every way to the loss that `benchmarks/losses.py` times, over the same random hidden states and heads."""

from collections.abc import Callable

import torch

from benchmarks.losses_report import DENSE, FLOOR, LIGER, SPARSE, SPEC_KD, TRL

# Which methods a cell runs: dense losses keep some ten tensors of tokens x vocabulary, for which not all have room
ALL, NO_DENSE, SCALING, OURS = "all", "no_dense", "scaling", "ours"


class Case:
    """Random hidden states and heads of one cell, and every way to the loss as a function without arguments.

    Float32 on a CPU. On a GPU bfloat16, as it is trained there.
    """

    def __init__(self, tokens: int, vocab: int, draft_hidden: int, teacher_hidden: int, device: str = "cpu"):
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16

        def make(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(dtype)

        self.tokens, self.vocab, self.device = tokens, vocab, torch.device(device)
        self.hidden = make(tokens, draft_hidden).requires_grad_()
        self.weight = make(vocab, draft_hidden, 2 * draft_hidden**-0.5).requires_grad_()
        self.teacher_hidden = make(tokens, teacher_hidden)
        self.teacher_head = torch.nn.Linear(teacher_hidden, vocab, bias=False, device=device, dtype=dtype)
        self.teacher_head.requires_grad_(False)
        self.teacher_head.weight.copy_(make(vocab, teacher_hidden, 2 * teacher_hidden**-0.5))
        self.labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)

    def methods(self, which: str) -> dict[tuple[str, str], Callable[[], None]]:
        """(loss, method) -> function; imports are here so that `--help` needs nothing."""
        from spec_kd.losses import DIVERGENCES

        names = ["forward_kl"] if which == SCALING else list(DIVERGENCES)
        # Filled, so that the kernel has given every page: the floor is products, not page faults
        self.buffers = [self.hidden.new_empty(self.tokens, self.vocab).fill_(0.0) for _ in range(2)]
        methods = {("-", FLOOR): self.run_products}
        for name in names:
            methods[name, SPEC_KD] = lambda name=name: self.run_fused(name, self.make_targets())
        sparse = self.make_sparse_targets(64)
        methods["forward_kl", SPARSE] = lambda: self.run_fused("forward_kl", sparse)
        if which == OURS:
            return methods
        betas = {"forward_kl": 0.0} if which == SCALING else {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
        for name, beta in betas.items():
            methods[name, TRL] = lambda beta=beta: self.run_trl(beta)
        if which != SCALING:
            methods["jsd", LIGER] = self.run_liger if self.device.type == "cpu" else self.run_liger_triton
        if which == ALL:
            methods["jsd", "TRL GKD, dense"] = lambda: self.run_gkd(0.5)
            for name in names:
                methods[name, DENSE] = lambda name=name: self.run_dense(name)
        return methods

    def run_products(self) -> None:
        """The four products of a loss with a live teacher, each one call over all tokens into memory that is there."""
        logits, teacher_logits = self.buffers
        with torch.no_grad():
            torch.mm(self.hidden, self.weight.T, out=logits)
            torch.mm(self.teacher_hidden, self.teacher_head.weight.T, out=teacher_logits)
            self.kept = (logits @ self.weight, logits.T @ self.hidden)

    def make_targets(self):
        from spec_kd.heads import LogitHead, LogitTransform
        from spec_kd.trainer.teachers.live import LiveLogits

        head = LogitHead(self.teacher_head, LogitTransform(), self.vocab)
        return LiveLogits(self.teacher_hidden, head, self.device)

    def make_sparse_targets(self, k: int):
        from spec_kd.losses import SPARSE_METHODS, SparseTensors

        targets, parts = self.make_targets(), []
        for start in range(0, self.tokens, 64):
            logits = targets(slice(start, min(start + 64, self.tokens)))
            parts.append(logits.log_softmax(-1).topk(k))
        log_p, ids = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return SparseTensors(SPARSE_METHODS["top_k_tail"], ids, log_p)

    def run_fused(self, name: str, targets) -> None:
        from spec_kd.losses import build_divergence, fused_linear_divergence

        output = fused_linear_divergence(
            self.hidden, self.weight, targets, self.labels, divergence=build_divergence(name)
        )
        (output.loss / self.tokens).backward()

    def run_trl(self, beta: float) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        teacher = (self.teacher_hidden, self.teacher_head.weight, None)
        divergence, _ = ChunkedDivergenceFunction.apply(self.hidden, self.weight, None, *teacher, beta)
        (divergence.sum() / self.tokens).backward()

    def run_liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        teacher = (self.teacher_hidden, self.teacher_head.weight)
        loss(self.hidden, self.weight, *teacher, self.labels).backward()

    def run_liger_triton(self) -> None:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        teacher = (self.teacher_hidden, self.teacher_head.weight)
        LigerFusedLinearJSD(jsd_beta=0.5)(self.hidden, self.weight, *teacher, None).backward()

    def run_gkd(self, beta: float) -> None:
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            teacher_logits = self.teacher_head(self.teacher_hidden)
        GKDTrainer.generalized_jsd_loss(self.hidden @ self.weight.T, teacher_logits, beta=beta).backward()

    def run_dense(self, name: str) -> None:
        from spec_kd.losses import dense_divergence

        with torch.no_grad():
            teacher_logits = self.teacher_head(self.teacher_hidden)
        dense_divergence(self.hidden @ self.weight.T, teacher_logits, name).mean().backward()
