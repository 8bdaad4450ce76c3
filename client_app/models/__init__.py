"""Task models: their common base, the built-in ones, those from transformers, and the choice by name."""
