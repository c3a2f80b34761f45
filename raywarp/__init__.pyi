"""The public names with their types, for type checkers; __init__.py imports them when they are
first used.
"""

from raywarp.adapters.merging import inspect as inspect
from raywarp.adapters.merging import merge as merge
from raywarp.adapters.peft import load_peft as load_peft
from raywarp.adapters.peft import save_peft as save_peft
from raywarp.adapters.recipe import Recipe as Recipe
from raywarp.algorithm.averaging import AntipodalError as AntipodalError
from raywarp.algorithm.averaging import ema as ema
from raywarp.algorithm.averaging import karcher as karcher
from raywarp.algorithm.averaging import lerp as lerp
from raywarp.algorithm.averaging import liti as liti
from raywarp.algorithm.averaging import slerp as slerp
from raywarp.algorithm.deltas import AdapterDelta as AdapterDelta
from raywarp.algorithm.deltas import add as add
from raywarp.algorithm.deltas import concatenate as concatenate
from raywarp.algorithm.deltas import scale as scale
from raywarp.algorithm.deltas import subtract as subtract
from raywarp.algorithm.factors import AdapterError as AdapterError
from raywarp.algorithm.finite import NotFiniteError as NotFiniteError
from raywarp.algorithm.geometry import geometry as geometry
from raywarp.algorithm.truncation import compress as compress
from raywarp.algorithm.truncation import truncate as truncate
from raywarp.baking.bake import bake as bake
from raywarp.ceiling_stage import ceiling as ceiling
from raywarp.cluster.faults import FaultError as FaultError
from raywarp.cluster.runtime import Stopped as Stopped
from raywarp.config.load import load_config as load_config
from raywarp.config.schema import Config as Config
from raywarp.config.schema import ConfigError as ConfigError
from raywarp.data.pypi import FetchError as FetchError
from raywarp.front_stage import front as front
from raywarp.planning.plan import plan as plan
from raywarp.reward_stage import reward as reward
from raywarp.rewards.reward import RewardError as RewardError
from raywarp.rollout.base_weights import BaseWeightsError as BaseWeightsError
from raywarp.rollout.effect import EffectError as EffectError
from raywarp.rollout.protocol import RolloutError as RolloutError
from raywarp.run.folder import Run as Run
from raywarp.storage.sealed import DamagedError as DamagedError
from raywarp.storage.sealed import StoreError as StoreError
from raywarp.sweep.sweep import tune as tune
from raywarp.warp import train as train
