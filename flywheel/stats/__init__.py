"""Small-sample statistics of the gate, the rollout and the reports.

Pure functions of numbers: no I/O, no clock, no random state. Arguments out of range raise ``ValueError``,
because they are a caller's mistake and never a user's. A confidence is two-sided unless a name says
otherwise: a one-sided test at level ``alpha`` reads one limit of the interval at ``1 - 2 * alpha``.

    sequential    looked at as often as one likes: betting e-processes and confidence sequences
    paired        two policies on the same seeds, a fixed number of pairs: score and exact tests
    proportions   success rates, their differences, demonstrated reliability
    ratios        timings and tracking errors over runs: percentiles and ratios
    spread        not where values lie but how far apart: collapse and growth of variance
    ranks         whether one measure orders policies as another does
    multiplicity  many tests at once

Sources
    Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.
    Clopper & Pearson, Biometrika 26 (1934) 404-413.
    McNemar, Psychometrika 12 (1947) 153-157 (exact conditional form: the sign test on the discordant pairs).
    Tango, Stat. Med. 17 (1998) 891-908 (score interval of a difference of paired proportions).
    Newcombe, Stat. Med. 17 (1998) 857-872 and Fagerland et al., Stat. Med. 33 (2014) 2850-2875, which
    compare the choices and hold the worked examples that the tests reproduce.
    Kalibera & Jones, ISMM (2013) 63-74 (ratios of paired runs with an interval, for timings).
    Ville, Étude critique de la notion de collectif (1939); Robbins, Ann. Math. Stat. 41 (1970) 1397-1409
    (mixtures of likelihood ratios: tests that hold at every time).
    Waudby-Smith & Ramdas, J. R. Stat. Soc. B 86 (2024) 1-27 (means of bounded variables by betting).
    Cover, Math. Finance 1 (1991) 1-29; Orabona & Jun, IEEE Trans. Inf. Theory 70 (2024) 436-455 (capital
    averaged over all bets: the universal portfolio, and its confidence sequences).
    Vovk & Wang, Ann. Stat. 49 (2021) 1736-1754 (which e-values may be multiplied, and which averaged).
    McCulloch, Commun. Stat. Theory Methods 16 (1987) 1377-1391 (spread of paired values, by ranks), after
    Pitman, Biometrika 31 (1939) 9-12 and Morgan, ibid. 13-19.
    Holm, Scand. J. Stat. 6 (1979) 65-70.
    Spearman, Am. J. Psychol. 15 (1904) 72-101.
    Li et al., CoRL 2024, arXiv:2405.05941 (mean maximum rank violation of a simulator).
"""

from flywheel.stats.estimates import Difference, Estimate, Moments, Percentiles
from flywheel.stats.multiplicity import holm
from flywheel.stats.paired import mcnemar, paired_difference, paired_interval, pairs_for_margin
from flywheel.stats.proportions import (
    clopper_pearson,
    proven_reliability,
    trials_for_reliability,
    trials_left,
    unpaired_difference,
    wilson,
)
from flywheel.stats.ranks import mean_maximum_rank_violation, rank_correlation
from flywheel.stats.ratios import (
    log_moments,
    paired_ratio,
    paired_ratio_p,
    percentiles,
    unpaired_ratio,
)
from flywheel.stats.sequential import confidence_sequence, e_value, log_capital
from flywheel.stats.spread import paired_spread_ratio, quantile_range

__all__ = [
    "Difference",
    "Estimate",
    "Moments",
    "Percentiles",
    "clopper_pearson",
    "confidence_sequence",
    "e_value",
    "holm",
    "log_capital",
    "log_moments",
    "mcnemar",
    "mean_maximum_rank_violation",
    "paired_difference",
    "paired_interval",
    "paired_ratio",
    "paired_ratio_p",
    "paired_spread_ratio",
    "pairs_for_margin",
    "percentiles",
    "proven_reliability",
    "quantile_range",
    "rank_correlation",
    "trials_for_reliability",
    "trials_left",
    "unpaired_difference",
    "unpaired_ratio",
    "wilson",
]
