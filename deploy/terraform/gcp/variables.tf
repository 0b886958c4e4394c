variable "project" {
  description = "The ID of the project that has the topics, the bucket and the accounts."
  type        = string
}

variable "location" {
  description = "Where the bucket is: the region of the cluster."
  type        = string
}

variable "bucket" {
  description = "The name of the bucket, which nobody else in the world has."
  type        = string
}

variable "bucket_prefix" {
  description = "Below which names in the bucket everything is: --storage=gs://BUCKET/PREFIX."
  type        = string
  default     = "elan"
}

variable "queue_prefix" {
  description = "What the names at Pub/Sub begin with: --queue=gcppubsub://PROJECT/PREFIX."
  type        = string
  default     = "mettle"
}

variable "pools" {
  description = "The pools of workers: letters, digits, dashes and underscores, 60 at most."
  type        = list(string)
  default     = ["default"]
  validation {
    condition     = alltrue([for p in var.pools : can(regex("^[a-zA-Z0-9_-]{1,60}$", p))])
    error_message = "A pool's name is of letters, digits, dashes and underscores, 60 at most; mettle setup makes the subscriptions of others."
  }
}

variable "lease_seconds" {
  description = "The lease of the queue's URL, in seconds."
  type        = number
  default     = 30
}

variable "attempts" {
  description = "The attempts of the queue's URL."
  type        = number
  default     = 3
}

variable "kubernetes_namespace" {
  description = "The namespace whose service accounts act as those made here."
  type        = string
  default     = "mettle"
}
