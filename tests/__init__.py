"""Tests, in folders that mirror the packages of timm_bcos."""
