"""Queues some of whose shards do not answer."""

import redis.asyncio
import redis.exceptions

__all__ = ["OneShardAway"]


class OneShardAway(redis.asyncio.Redis):
    """While `is_away`, every call to the first shard fails."""

    is_away = True

    async def execute_command(self, *command: object, **options: object) -> object:
        if self.is_away and any(str(word).startswith("oasst:{0}") for word in command):
            raise redis.exceptions.ConnectionError("away")
        return await super().execute_command(*command, **options)
