"""What the registry does: domain values in and out; each service owns its transactions.

catalogue      names, versions, aliases, bases: reading and pointing
publishing     folders into blobs and rows
compositions   recipes into plans and artefacts
repositories   what lies at a revision; pushing: commits that become versions and bases;
               repository_admin: created, renamed, deleted, branches, tags; listing: by tag
importing      adapters and bases of other hubs
jobs           the queue of what runs in the background; worker runs it; job_kinds: what a job can be
tokens         who asks; namespaces: what they may; visibility: what they see; audit: what they did
lifecycle      yank, deprecate, quarantine, delete; collection: what nothing names any more
local          all of them behind registry.interface.Registry
"""
