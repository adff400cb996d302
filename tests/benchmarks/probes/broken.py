"""RLOO broken in three places, as a file of one's own."""

from lm_envs.algos.ops import advantages as adv
from lm_envs.algos.rloo import RLOO


class NoBaseline(RLOO):
    """Returns are advantages."""

    def prepare(self, traj, before):
        returns = adv.discounted_returns(self.rewards(traj, before), traj.mask, self.config.gamma)[:, :1]
        return {"advantage": adv.masked(returns.expand(traj.mask.shape), traj.mask)}


class ClampedKL(RLOO):
    """A token that is less likely than under the reference is charged nothing, where it should be paid."""

    def rewards(self, traj, before):
        gap = traj.logprob - traj.ref_logprob
        return super().rewards(traj, before) + self.kl_coefficient() * adv.masked(gap.clamp(max=0), traj.mask)


class TokenMean(RLOO):
    """The mean of a text's rewards, where it should be their sum."""

    def rewards(self, traj, before):
        return super().rewards(traj, before) / traj.lengths[:, None]
