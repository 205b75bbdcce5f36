"""Where the time of a model goes: per module, per kind of module and per operator."""

from lightspine.benchmark.profiling.profile import ModelProfile as ModelProfile
from lightspine.benchmark.profiling.profile import ProfileSettings as ProfileSettings
from lightspine.benchmark.profiling.profile import profile_model as profile_model

__all__ = ["ModelProfile", "ProfileSettings", "profile_model"]
